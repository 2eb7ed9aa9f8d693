"""Uses of the engine without a server: bulk runs into tables, replay of a folder, verification of a bundle."""
