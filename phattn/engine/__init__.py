"""What any training needs, whatever it trains: files, weights, run folders, the loop, several processes. No vision here."""
