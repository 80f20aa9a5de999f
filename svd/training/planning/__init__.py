"""What a training will need: parameters, memory, operations and hours, from one step of it on `meta` tensors."""
