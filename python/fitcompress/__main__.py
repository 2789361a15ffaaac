"""``python -m fitcompress``."""

from fitcompress.cli import main

main()
