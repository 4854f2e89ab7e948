"""What differs by device, and faults of other packages that this project has to correct."""
