"""The same operations in plain torch (`impl="torch"`), forward and backward."""
