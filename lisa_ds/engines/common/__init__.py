"""LISA for any framework: draws, policies, learning-rate warm-up, norm-growth limiter, cut-off of backward."""
