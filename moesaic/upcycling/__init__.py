"""Turn a dense model folder into a mixture-of-experts folder, and prove what that did to it."""
