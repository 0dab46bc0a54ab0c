import torch
from neuron_placeholder import PlaceholderModule, stand_in

stand_in(__name__)
# The real package registers C++ classes; neuronx-distributed names them in annotations.
torch.classes.neuron = PlaceholderModule("torch.classes.neuron")
