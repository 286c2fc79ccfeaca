"""Keys and values between steps."""
