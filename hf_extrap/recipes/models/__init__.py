"""The models of this package; `hf_extrap.auto_classes` makes them known to the Auto classes.

A saved model carries the code in this folder: its configuration copies the file that it is in, and the files that this
one imports by `from .name import …`. No file here imports another part of the package.
"""

from .lstm import ExtrapLstmConfig, ExtrapLstmForCausalLM, ExtrapLstmModel
from .resnet import ExtrapResNetConfig, ExtrapResNetForImageClassification

__all__ = [
    "ExtrapLstmConfig",
    "ExtrapLstmForCausalLM",
    "ExtrapLstmModel",
    "ExtrapResNetConfig",
    "ExtrapResNetForImageClassification",
]
