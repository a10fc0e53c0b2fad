"""What a run will need before it is started, summed over what the layers say of themselves."""
