"""The mathematics: UNet++ as the paper draws it, its losses and its training (torch)."""
