"""Not a placeholder of everything: torch_xla takes a libneuronxla with a plugin path for a Neuron machine."""

from neuron_placeholder import Placeholder

neuron_xla_compile = neuron_xla_wlo_compile = Placeholder
