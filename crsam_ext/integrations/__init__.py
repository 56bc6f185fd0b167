"""What other libraries need to train with CRSAM; a module imports its library when it is itself imported."""
