"""`unetpp doctor`: examines an installation, changes nothing, and says what is wrong and what to do."""
