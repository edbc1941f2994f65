"""The slot memory of the Raven baseline."""
