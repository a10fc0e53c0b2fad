"""What the machine offers: devices, process groups, exit codes, and the errors users see."""
