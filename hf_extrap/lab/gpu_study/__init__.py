"""A study of a few minutes on one GPU: ResNet-20 on CIFAR-10 at a batch of 8,192 images, 32 virtual workers of 256."""
