"""What is trained: ResNet, batch norm, precision, optimizer, schedule, and the memory they take."""
