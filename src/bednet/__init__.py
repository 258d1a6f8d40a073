"""bednet: a net over Eclipse Mosquitto."""
