"""Every architecture of timm, torchvision and transformers: expand, train, fold back, fuse."""
