"""Small reference models: a network for the digits, ResNets for CIFAR-10."""

from fitcompress.zoo.digits import DigitsNet
from fitcompress.zoo.resnet_cifar import CifarResNet, resnet20, resnet56

__all__ = ["BUILT_IN", "CifarResNet", "DigitsNet", "resnet20", "resnet56"]

BUILT_IN = {"digits": DigitsNet, "resnet20": resnet20, "resnet56": resnet56}
