"""Compress a network of your own in four lines; here the digits network stands in.

python examples/compress_your_own.py
"""

import fitcompress as fc
from fitcompress.data import load_dataset
from fitcompress.train.supervised import train
from fitcompress.zoo import DigitsNet

data = load_dataset("digits")
model = DigitsNet()
train(model, data.training(64), epochs=8)  # yours is trained already

small = fc.compress(model, data.calibration(), fc.Budget(size="5%"))
size = fc.save(small, "digits-small.safetensors")
loaded = fc.load("digits-small.safetensors", DigitsNet())
print(fc.report(model, small, data.testing()))
print(f"{size:,} bytes; loaded: {fc.evaluate(loaded, data.testing()).accuracy:.2f} %")
