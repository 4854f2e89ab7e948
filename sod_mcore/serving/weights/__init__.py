"""How a version of the weights reaches engines: by folder, by broadcast or by value."""
