"""The engine without a server: many images into tables, replacement on a folder, the check of a bundle."""
