"""What is told of a run under ZeRO-3: norms of weights, gradients and updates by unit, and the bytes that are alive."""
