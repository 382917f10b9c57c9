"""Pictures of the browser app for the README, and how quick it is."""
