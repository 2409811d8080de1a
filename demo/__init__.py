"""The demonstration of quickstart.py: questions that can be checked, the way through the stages. Imports all others."""
