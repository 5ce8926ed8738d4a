"""Building blocks of models: built with a LayerContext, called with the tensors of one step."""
