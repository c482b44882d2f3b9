"""One folder an op: a plain-torch reference, a kernel, checks of shapes. Tensors in, tensors out."""
