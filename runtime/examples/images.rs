//! Converts an image, lists the images in the cache, and removes it from there:
//! `cargo run --package kindling --example images -- ./app.tar`
#![expect(clippy::print_stdout, reason = "it prints a list")]

use kindling::image::{images, remove_image};
use kindling::{Image, PullPolicy};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args_os().nth(1).ok_or("name an image")?;
    Image::open_with(&name, PullPolicy::Never)?;
    for image in images()? {
        println!("{} {:?} {} bytes", image.id, image.names, image.bytes);
    }
    let removed = remove_image(&name)?;
    println!("{} removed, {} left", removed.len(), images()?.len());
    remove_image(&name).expect_err("an image that is removed cannot be removed again");
    Ok(())
}
