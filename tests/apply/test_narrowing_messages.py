"""What one rank has solved is the same on the others."""

import json

import pytest
import torch

from secateur.apply.narrowing_messages import as_message, from_message
from secateur.distributed.messages import pack, unpack
from secateur.layers.integers import packed, unpacked
from secateur.methods import method_class
