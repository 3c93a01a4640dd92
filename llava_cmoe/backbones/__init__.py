"""What is frozen: the stock model, the places in it that may grow, the features a locator reads."""
