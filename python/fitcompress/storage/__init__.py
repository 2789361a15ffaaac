"""The packed file: codes, scales and leftovers in one ``.safetensors``."""
