"""How a step is computed: the process group, DeepSpeed, the optimizer, the learning-rate schedule."""
