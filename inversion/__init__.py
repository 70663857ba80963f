"""From pixels back to noise: gradient-free decoder inversion and the inversion of samplers; knows nothing of marks."""
