"""Training transcoders on the activations of a model, streamed through nnsight."""
