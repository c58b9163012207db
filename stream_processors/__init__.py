"""What happens by itself: records come in, commands go out. Hosted in one process or by Faust, and unaware of either."""
