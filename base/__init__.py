"""What every room needs: files that are whole, and the command line. Standard library only; imports no other room."""
