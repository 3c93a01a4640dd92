"""The second half of "fewer experts": which experts of a finished run can be merged, and what that costs."""
