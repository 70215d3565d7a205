"""Files as strangers might make them, given to every parser that reads what others have written."""
