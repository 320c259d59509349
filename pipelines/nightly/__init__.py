"""The night: every customer's adapter is brought up to date if its data changed, and only better ones are promoted."""
