"""What is studied: one config file a study, each with ``get_config()``."""
