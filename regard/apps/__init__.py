"""The applications behind the command line: demo, doctor, look."""
