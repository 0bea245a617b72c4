"""What strings jobs together: the demo and the evidence studies."""
