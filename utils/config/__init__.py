"""Reading, overriding, checking and building by name from JSON configs."""
