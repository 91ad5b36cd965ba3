"""How fast would ResNet-50 train on many GPUs, by a model that published figures have set?"""
