"""Laws of the losses, and that taking them in chunks changes nothing but the memory."""
