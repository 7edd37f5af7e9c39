"""Many engines behind one address, on Ray Serve; requests go where their prefix was computed."""
