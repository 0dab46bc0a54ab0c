from neuron_placeholder import stand_in

stand_in(__name__)
