"""What the machine is: figures, how they are found out, and how they are kept."""
