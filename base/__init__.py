"""Atomic files and the command line. Standard library only; imports no other package of the project."""
