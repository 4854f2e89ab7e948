"""The rollout pool on Ray: actors that play groups, and the driver that deals them."""
