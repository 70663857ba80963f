"""From pixels back to noise: gradient-free decoder inversion and sampler inversion. Independent of watermarks."""
