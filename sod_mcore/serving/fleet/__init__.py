"""The processes that serve: started, tested, watched, started again, on this machine or on Ray."""
